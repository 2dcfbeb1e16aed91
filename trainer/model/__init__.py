"""The two networks and the losses."""
