"""What the precisions of a file are called; apart from what they are, which takes torch to say."""

PRECISIONS = ("fp32", "fp16", "bf16")
