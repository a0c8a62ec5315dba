"""The number formats: bf16, fp16 and fp32; the elements E4M3 and E2M1; the exponents UE8M0. Tables and one-rounding casts."""
