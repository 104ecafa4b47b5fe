"""What people look at: figures, charts, the HTML report and the model card."""
