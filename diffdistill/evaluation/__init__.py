"""How good generated images are: features, distances, neighbourhoods, and pictures to look at."""
