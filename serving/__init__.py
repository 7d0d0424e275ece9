"""The thin read path: HTTP in, slates out; knows nothing of agents and folds, and writes no state.

Files, from the door inwards:

    app          builds the application and owns its resources
    api          the routes
    doors        what a route is, and its OpenAPI description
    guard        who may ask: Host, Origin, key and rate, before any route
    keys         API keys: their file, their scopes, their rates
    overload     how much this process takes on at once, and when it says 429
    messages     what comes in and goes out, and how it is refused
    erasure      forgetting a user, and the receipt
    ingest       events and catalogue entries -> the log
    lookup       a slate, similar, popular
    introspect   health, settings, state: the system explains itself
    metrics      what /metrics answers, of this process and of those without a port
    parts        what the routes work with
    snapshot     item and model arrays of this process, kept live by the feeds
    slates       served slates on their way to the log
    dashboard/   what the shop front and the dashboard ask for
"""
