"""The commands: dualblade (admin.py) and dualblade-fio (fio.py and what it is made of)."""
