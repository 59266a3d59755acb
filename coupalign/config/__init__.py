"""What a run is: the schema (`schema.py`) and how it is read, written and compared (`load.py`). Imports no torch."""
