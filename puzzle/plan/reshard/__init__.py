"""How weights get from one placement to another: roles, rows, routes, and each rank's part."""
