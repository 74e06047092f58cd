"""What a fitted law says of other runs, and which law to believe."""
