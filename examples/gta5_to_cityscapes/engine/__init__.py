"""Long, safe and parallel training of any losses; nothing in here knows of anchors."""
