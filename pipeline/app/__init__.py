"""The app: a page in the browser that captions pictures, and one that shows how training goes."""
