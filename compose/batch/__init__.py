"""Images of many scenes and seeds: reads scenes from files and tables, plans the calls, and runs them."""
