"""Megatron-core's GPTModel for packed rows: architecture, rotary positions, shared-prompt attention, response head."""
