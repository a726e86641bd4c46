"""What the arms of an experiment show: measured, written down and drawn."""
