"""ANSWER: what is the answer?

Holds the gateway: OpenAI's chat API, comparisons, the feedback routes and the chat page.
Never holds torch or training. Start reading at `chat.py`.
"""
