"""What a process is among others: groups, clocks, traces, the watchdog."""
