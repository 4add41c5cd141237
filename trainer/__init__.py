"""LEARN: what did we learn?

Holds the reward model, PPO, rollouts, evaluation and the learning cycle.
Never serves HTTP. Start reading at `ppo.py`, then `cycle.py`.
"""
