"""What a run costs before it starts: memory, FLOPs, communication and time, by arithmetic on sizes and lengths.

profile (lengths → rows)  →  parameters, activations → memory
                          →  flops, communication → performance → search
"""
