"""Number formats, as tables and one-rounding casts: bf16, fp16, fp32; the elements E4M3 and E2M1; UE8M0."""
