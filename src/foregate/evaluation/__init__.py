"""Every predictor on the same held-out prompts: accuracy, misses, simulated time; leaderboard and studies."""
