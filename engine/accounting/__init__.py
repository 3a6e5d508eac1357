"""Privacy accounting over the dp-accounting library; never imports torch."""
