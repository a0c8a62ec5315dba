"""What a case feeds a kernel: the families of inputs and the property each has, scales, shapes of real models."""
