"""Making scored groups: verifiable constraints, rewards over them, and sampling from a chat model."""
