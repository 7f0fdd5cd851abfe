"""PPO as DeepSpeed-Chat runs it: four models under ZeRO, each process a replica, on the package deepspeed."""
