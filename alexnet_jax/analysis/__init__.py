"""What people look at after training."""
