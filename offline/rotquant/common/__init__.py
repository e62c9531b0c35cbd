"""What every wing stands on: JSON as it is found, schemas, progress, signals, numbers about rows."""
