"""The algorithm: PPO arithmetic, what one rollout batch is, rewards, the iteration."""
