"""LISTEN: what did people say, and who may say it?

Holds events, their log, people's keys and tokens, the fold to current state and the snapshots that train.
Never holds HTTP or torch. Start reading at `events.py`, then `sqlite_log.py`.
"""
