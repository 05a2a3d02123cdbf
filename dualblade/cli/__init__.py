"""The commands: dualblade (admin.py)."""
