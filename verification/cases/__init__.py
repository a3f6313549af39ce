"""What is asked: cases as data, and the numbers drawn for them. Nothing here judges."""
