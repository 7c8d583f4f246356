"""Start `moesparse serve`, talk to it with the openai client, and end it.

pip install '.[serve]'                                  # in the source folder
python examples/serve_and_chat.py                       # the embedded model
python examples/serve_and_chat.py out/olmoe-packed --prompt "The capital of France is"
"""

import argparse
import signal
import subprocess
import sys

from openai import OpenAI


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default="demo", help="a folder, a hub id, or demo")
    arguments.add_argument("--prompt", default="It is a truth universally acknowledged, that")
    chosen = arguments.parse_args()

    # a base model has no chat template; "plain" lets it go on from the text of the last message
    words = ["serve", chosen.model, "--port", "0", "--chat-template", "plain"]
    server = subprocess.Popen(
        [sys.executable, "-m", "moesparse", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in server.stderr:
            print(line, end="", file=sys.stderr)
            if line.startswith("serving"):
                address = line.split(" at ")[1].split()[0]
            if "startup complete" in line:
                break
        else:
            sys.exit("the server did not start")

        client = OpenAI(base_url=address, api_key="none")
        options = {"model": chosen.model, "max_tokens": 32, "temperature": 0}
        answer = client.completions.create(prompt=chosen.prompt, **options)
        print(f"completion: {chosen.prompt}{answer.choices[0].text}")

        messages = [{"role": "user", "content": chosen.prompt}]
        parts = []
        for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
            parts.append(chunk.choices[0].delta.content or "")
        print(f"chat: {chosen.prompt}{''.join(parts)}")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


if __name__ == "__main__":
    main()
