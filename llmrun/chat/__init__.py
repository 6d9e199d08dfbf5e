"""Conversations: templates, thinking, history."""
