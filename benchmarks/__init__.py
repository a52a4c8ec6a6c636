"""How fast the cascade is, always measured side by side with another way in the same run."""
