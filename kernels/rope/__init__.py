"""Rotary positions: pairs of coordinates turned by an angle that grows with the position."""
