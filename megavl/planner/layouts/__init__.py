"""How decoder layers are split over stages: balance, search and checks."""
