"""What ``make test-gpu`` runs on a machine with a GPU."""
