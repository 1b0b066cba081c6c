"""``everloop doctor``: whether the machine, the settings and each service are as they should be, and what to do."""
