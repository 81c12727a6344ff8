"""pusa"""
