"""What the pages claim, and how the logs say it: read by scripts/check_claims.py."""
