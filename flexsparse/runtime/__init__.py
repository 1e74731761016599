"""What happens at a call: inputs are checked, derived tensors made, and a backend run."""
