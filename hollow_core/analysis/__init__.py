"""What is in a LoRA, block by block (Hollowed Net, Sec. 4.1). The size of a change is not its influence."""
