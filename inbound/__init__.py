"""What the world sends back: mail to our return paths, clicks and unsubscribes."""
