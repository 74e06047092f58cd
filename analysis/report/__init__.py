"""What a reader is shown: findings, figures, the page."""
