"""PROMOTE: which adapter may answer whom?

Holds the registry, manifests, gates, rollout, the one client of the model server and what runs the system.
Never holds torch. Start reading at `rollout.py`, then `routing.py`.
"""
