"""A model as a folder: opened, saved, packed, looked at, finished."""
