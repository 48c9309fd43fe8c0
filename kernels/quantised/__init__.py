"""Products with weights in int8 or NF4 that are dequantised where they are loaded."""
