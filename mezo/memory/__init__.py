"""What a run takes: measured, or planned without loading any weights."""
