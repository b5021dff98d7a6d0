"""What `lit-peft merge` and `lit-peft export` do: a result as a folder that opens elsewhere."""
