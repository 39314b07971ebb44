"""What is quantized: architecture, preprocessing, how its reference weights are made; one file a family."""
