"""What the pages of trainings and runs are made of: templates, charts, numbers in words."""
