"""Who may do what: accounts, sessions, API keys, roles, and the gate that every route stands behind."""
