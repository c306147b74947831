"""How far each weight may move (TOCO)."""
