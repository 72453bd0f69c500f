"""From a stock pipeline to prompts: how it calls its network is heard, not looked up, so one wrapper serves all."""
