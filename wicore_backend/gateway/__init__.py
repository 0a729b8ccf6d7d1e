"""The gateway: the OpenAI API, WebSocket and a chat page in front of Triton.

It reaches the engine over Triton's gRPC alone, so that it runs beside the server or far from it, and in several
copies. It knows the wire and nothing of what is behind it: neither torch nor the engine is imported here.

    __main__       reads settings, runs uvicorn, drains on SIGTERM
    app            puts the parts together
    backend        what the routes need of a server of models; `triton_backend` is the one there is
    generation     one answer on its way: admitted, timed, recorded, cancelled when its client leaves
    openai/        OpenAI's endpoints; `inference`, `status` and `chat_socket` are Wicore's own
    extensions     what is plugged in: access, limits, metrics, tracing
"""
